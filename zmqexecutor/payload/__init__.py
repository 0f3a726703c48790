"""What is in a message for a worker: functions, arguments and results, as bytes."""
