"""What an adapter is: its spec, its form, its scaling, its starting values.  No model in sight."""
