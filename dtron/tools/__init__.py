"""Programs that nobody imports: verify, show, generate, profile."""
