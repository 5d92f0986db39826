"""What trains and judges models: comparisons, recall, structured prompting, the report of a training run."""
