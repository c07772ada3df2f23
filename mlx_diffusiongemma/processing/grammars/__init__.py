"""Grammars that a reply follows: of JSON Schemas, regular expressions, Lark, and calls of declared tools."""
