"""The command line: options to requests, requests to runs."""
