"""The web console: static files, and the route that serves them."""
