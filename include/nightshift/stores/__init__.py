"""What outlives a process: objects, the ledger of paid calls, and the answers that were paid for."""
