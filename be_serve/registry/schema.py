"""The tables of the registry, schema version 1.

be_meta      one row: schema_version, revision (grows with every change)
be_token     one row per id, removed ids included; replicas poll this table
be_version   one row per registered version, with the bytes of the token file; a row never changes
be_prompt    stored prompt texts, one row per id; databases of early be-serve versions lack this table
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 1


class Base(DeclarativeBase):
    metadata = MetaData()


class Meta(Base):
    __tablename__ = "be_meta"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    schema_version: Mapped[int] = mapped_column(Integer)
    revision: Mapped[int] = mapped_column(BigInteger)


class TokenRow(Base):
    __tablename__ = "be_token"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(Integer)
    revision: Mapped[int] = mapped_column(BigInteger, index=True)
    removed: Mapped[bool] = mapped_column(Boolean, default=False)
    match_sha256: Mapped[str | None] = mapped_column(String(64), nullable=True)
    """Digest of the prompt that the token matches (`register --match`), else NULL. The index below makes it unique."""

    __table_args__ = (Index("be_token_match", "match_sha256", unique=True),)


class PromptRow(Base):
    __tablename__ = "be_prompt"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    text: Mapped[str] = mapped_column(Text)


class VersionRow(Base):
    __tablename__ = "be_version"

    id: Mapped[str] = mapped_column(String(64), ForeignKey("be_token.id"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    manifest: Mapped[str] = mapped_column(Text)
    artifact: Mapped[bytes] = mapped_column(LargeBinary(length=2**30), deferred=True)
    created_at: Mapped[object] = mapped_column(DateTime(timezone=True))
