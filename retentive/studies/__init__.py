"""What trains and judges models: comparisons, recall, structured prompting, the report of a training run."""

STUDIES = {
    "run": "retentive.studies.training_run",
    "recall": "retentive.studies.recall",
    "prompting": "retentive.studies.prompting",
}
"""Those in the shape of a bench (see `retentive.bench`), which `retentive bench` runs as well."""
