"""The one path of an answer: chatbot, prompt, engine, account."""
