"""The hook receiver: the daemon on a target host, without Prefect, Kafka or SQLAlchemy."""
