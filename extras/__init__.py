"""Optional integrations, each imported only where a flag asks for it."""
