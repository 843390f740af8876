"""The wire: requests and responses as the contract has them, and no decisions."""
