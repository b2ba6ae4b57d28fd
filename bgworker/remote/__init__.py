"""Tasks whose code runs on other people's executors, and tasks that go on after a crash."""
