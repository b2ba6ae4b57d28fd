"""What is recorded: events, errors, the records that travel, and their text."""
