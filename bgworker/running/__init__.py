"""What runs: the Scheduler, its pool of threads, and the tasks."""
