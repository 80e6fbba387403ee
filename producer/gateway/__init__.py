"""The HTTP gateway: submit, wait, fetch and watch for clients that do not speak to the broker. Starts without torch."""
