"""The trainer and the promoter: from rows in Delta tables to speculator versions in MLflow."""
