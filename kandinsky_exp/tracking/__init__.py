"""MLflow. A record goes tracker → outbox (disk_queue) → sender → delivery → mlflow_run, which writes to the store."""
