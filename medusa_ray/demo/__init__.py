"""The embedded default: text-to-SQL chats, the small base that knows them, and its training."""
