"""The local web page: server, jobs, and who may ask."""
