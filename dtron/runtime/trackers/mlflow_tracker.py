"""MLflow (``--track mlflow``), on the server, database or folder of ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from dtron.runtime.trackers.tracker import About, Ending

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MOST = 1000  # metrics in one request
MOST_PARAMS, LONGEST = 100, 500  # params in one request, and characters of a value


class MlflowRun:
    """A run of an experiment, through a client: the package's own current run is left alone.

    A param of MLflow cannot change. A value that differs at a later start becomes a tag of the same
    name."""

    def __init__(self, about: About) -> None:
        self._client = MlflowClient()
        if about.known_as is None:
            found = self._client.get_experiment_by_name(about.project)
            experiment = (
                self._client.create_experiment(about.project)
                if found is None
                else found.experiment_id
            )
            run = self._client.create_run(experiment, run_name=about.name)
        else:
            run = self._client.get_run(about.known_as)
            self._client.update_run(about.known_as, status="RUNNING")
        self.known_as: str = run.info.run_id
        where = re.sub(r"//[^/@]*@", "//", self._client.tracking_uri)  # without a password
        self.place = f"run {self.known_as} of {where}"
        old = run.data.params
        values = {name: str(value)[:LONGEST] for name, value in about.config.items()}
        params = [Param(name, x) for name, x in values.items() if name not in old]
        changed = {name: x for name, x in values.items() if old.get(name, x) != x}
        tags = changed | {f"start.{name}": str(x) for name, x in about.start.items()}
        for i in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self.known_as, params=params[i : i + MOST_PARAMS])
        self._client.log_batch(self.known_as, tags=[RunTag(name, x) for name, x in tags.items()])

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        now = int(1000 * time.time())
        metrics = [
            Metric(name, float(value), now, record["step"])
            for record in records
            for name, value in record.items()
            if value is not None and name != "step"
        ]
        for i in range(0, len(metrics), MOST):
            self._client.log_batch(self.known_as, metrics=metrics[i : i + MOST])

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self.known_as, STATUS[ending])


def open_tracker(about: About) -> MlflowRun:
    return MlflowRun(about)
