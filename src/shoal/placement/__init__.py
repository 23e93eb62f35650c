"""Which devices there are, and who gets them. Nothing here starts a process or touches a GPU's memory."""
