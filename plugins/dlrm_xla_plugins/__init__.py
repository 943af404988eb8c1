"""The project's own approximations of embedding tables; each is found through the entry points of setup.cfg."""
