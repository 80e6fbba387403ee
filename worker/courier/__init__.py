"""The courier: delivers webhooks from the outbox, without torch."""
