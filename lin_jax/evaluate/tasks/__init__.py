"""What `eval.py` can measure, one file a task."""
