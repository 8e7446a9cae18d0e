"""What several check modules share with each other or with the tests."""
