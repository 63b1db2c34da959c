"""The course of docs/course: a folder of small files for a student, checks of each lab, and the
grading of many folders. Solutions are not in the package."""
