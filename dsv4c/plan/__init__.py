"""What the compiler hands to the runtime: a plan as plain data."""
