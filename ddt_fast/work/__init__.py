"""The work of the commands that have no other module for it; a command imports it when it has parsed its options."""
