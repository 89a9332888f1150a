"""Files, folders, clocks, exit codes and tables."""

from scale_prune.system.exits import LOST_CONTACT, STOPPED, StopSignal
from scale_prune.system.folders import (
    RECIPE,
    REPORT,
    appears,
    back_on_failure,
    check_new,
    check_writable,
    complete_or_absent,
    is_set_aside,
    name_beside,
    sync,
    whole_or_absent,
    write_atomically,
)
from scale_prune.system.packages import versions
from scale_prune.system.stopwatch import Seconds
from scale_prune.system.tables import json_text, markdown_table
