"""The programs that users start: commands, chat, server."""
