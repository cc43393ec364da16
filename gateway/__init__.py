"""What every program must mean the same by: names, settings, errors, telemetry."""
