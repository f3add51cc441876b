"""What every program needs: files, signals, processes, logs, secrets, host memory."""
