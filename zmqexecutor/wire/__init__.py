"""How the processes reach each other: messages, sockets, journals, shared memory."""
