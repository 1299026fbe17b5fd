"""What runs inside the processes of a fault lab."""
