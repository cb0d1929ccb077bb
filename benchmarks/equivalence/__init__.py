"""Nothing but time changes: the same answers under pressure, and ordinary traffic as fast."""
