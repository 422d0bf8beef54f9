"""Output for people: the live screen, and the report, tables and pictures afterwards."""
