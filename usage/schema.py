"""The spool's tables. What they hold: :mod:`usage.spool`; who asks for what: :mod:`usage.archive`."""

from __future__ import annotations

from typing import Final

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS requests (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  request_id TEXT NOT NULL UNIQUE,
  revision INTEGER NOT NULL,
  client_request_id TEXT,
  organization_id TEXT NOT NULL,
  kind TEXT NOT NULL,
  started_us INTEGER NOT NULL,
  record TEXT,
  told TEXT NOT NULL,
  settlement TEXT,
  tried_s INTEGER,
  settled INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS requests_started ON requests (started_us);
CREATE INDEX IF NOT EXISTS requests_client ON requests (client_request_id) WHERE client_request_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS requests_allowed ON requests (organization_id, started_us) WHERE kind = 'forwarded';
CREATE INDEX IF NOT EXISTS requests_unsettled ON requests (seq) WHERE settled = 0;
CREATE TABLE IF NOT EXISTS attempts (
  request_id TEXT NOT NULL, started_us INTEGER NOT NULL, backend TEXT NOT NULL,
  status INTEGER NOT NULL, flags TEXT NOT NULL, duration_ms INTEGER NOT NULL,
  PRIMARY KEY (request_id, started_us, backend)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS attempts_started ON attempts (started_us);
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id TEXT NOT NULL UNIQUE,
  request_id TEXT NOT NULL,
  organization_id TEXT NOT NULL,
  actor TEXT NOT NULL,
  action TEXT NOT NULL,
  created_us INTEGER NOT NULL,
  metadata TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_created ON events (created_us);
CREATE INDEX IF NOT EXISTS events_organization ON events (organization_id, created_us);
CREATE INDEX IF NOT EXISTS events_rare ON events (action, created_us) WHERE action <> 'REQUEST_DENIED';
CREATE INDEX IF NOT EXISTS events_request ON events (request_id) WHERE request_id <> '';
CREATE TABLE IF NOT EXISTS refused (
  stream TEXT NOT NULL, place INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (stream, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tallies (kind TEXT PRIMARY KEY, requests INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ended (moment INTEGER PRIMARY KEY, requests INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS policies (digest TEXT PRIMARY KEY, document TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
TABLES: Final = {
    "requests": "seq",
    "events": "seq",
    "attempts": "request_id",
    "refused": "place",
    "policies": "digest",
    "tallies": "kind",
    "marks": "name",
}
