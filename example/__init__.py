"""An example web application and the demonstration that redeploys it under load."""
