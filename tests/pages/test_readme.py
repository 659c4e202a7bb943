"""Only the block between the markers changes; a file without them is refused."""

import pytest

from mlx_cxr.core.errors import UserError
from mlx_cxr.pages.readme import replace_block


def test_only_the_named_block_changes_and_twice_is_once(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("top\n<!-- begin a -->\nold\n<!-- end a -->\n<!-- begin b -->\nkept\n<!-- end b -->\nbottom\n")
    replace_block(path, "a", "| new |\n")
    once = path.read_text()
    assert (
        once == "top\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\n<!-- begin b -->\nkept\n<!-- end b -->\nbottom\n"
    )
    replace_block(path, "a", "| new |")
    assert path.read_text() == once


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- begin a -->\n",
        "<!-- end a -->\n<!-- begin a -->\n",
        "<!-- begin a -->\n" * 2 + "<!-- end a -->",
    ],
)
def test_missing_doubled_or_swapped_markers_are_refused_and_the_file_is_kept(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match="begin a"):
        replace_block(path, "a", "new")
    assert path.read_text() == text
    with pytest.raises(UserError, match=r"absent\.md"):
        replace_block(tmp_path / "absent.md", "a", "new")
