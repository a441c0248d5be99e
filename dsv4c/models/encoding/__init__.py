"""How DeepSeek-V4 is spoken to: conversations to prompts, completions back to messages.

The official rules, which differ by release: `rules` has what differs, `messages` the conversation, `render`
the prompt, `dsml` the grammar of tool calls, `parse` the way back, `tokenizer` what turns texts into ids.
"""
