"""The wire: .proto files, generated stubs beside them, conversion to and from core types."""
