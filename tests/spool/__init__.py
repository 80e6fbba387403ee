"""The spool: a program of its own (`kill_at_line`) needs the folder as a package."""
