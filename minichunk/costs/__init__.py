"""What a step costs: counted, forecast, measured, compared."""
