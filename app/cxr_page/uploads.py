"""Uploads stay in memory."""

from __future__ import annotations

import streamlit as st


def keep_uploads_in_memory() -> None:
    """Have the server keep an upload in memory while it arrives, as it does afterwards.

    Streamlit's server takes uploads with Starlette, which writes what is over 1 MB into a temporary file until the
    upload is complete. Older versions, with Tornado, never did.
    """
    try:
        from starlette.formparsers import MultiPartParser
    except ImportError:
        return
    MultiPartParser.spool_max_size = 2 * 2**20 * st.get_option("server.maxUploadSize")
