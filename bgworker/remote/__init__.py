"""Bodies of tasks on other people's executors; their record, and the future, stay here."""
