"""The inference table: record, spool, exactly-once writer, Delta table, query."""
