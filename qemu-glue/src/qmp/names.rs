//! Closed sets of QEMU's names, each with a place for a name that we do not know.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
            /// A name of another version of QEMU.
            Unknown(String),
        }

        impl $name {
            /// QEMU's name.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)+
                    Self::Unknown(name) => name,
                }
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                match name.as_str() {
                    $($text => Self::$variant,)+
                    _ => Self::Unknown(name),
                }
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

names! {
    /// Run state of the guest. //= qemu qapi/run-state.json RunState
    RunState {
        /// Stopped by a debugger.
        Debug = "debug",
        /// Waits for an incoming migration.
        InMigrate = "inmigrate",
        /// QEMU met an error that it cannot go on from.
        InternalError = "internal-error",
        /// Stopped by an I/O error.
        IoError = "io-error",
        /// Stopped by `stop`, or loaded and not started.
        Paused = "paused",
        /// Stopped after its migration completed.
        PostMigrate = "postmigrate",
        /// Started with `-S` and not run since.
        PreLaunch = "prelaunch",
        /// Stopped for the end of a migration.
        FinishMigrate = "finish-migrate",
        /// Stopped to load a snapshot.
        RestoreVm = "restore-vm",
        /// The vCPUs run.
        Running = "running",
        /// Stopped to save a snapshot.
        SaveVm = "save-vm",
        /// Shut down with `-no-shutdown`.
        Shutdown = "shutdown",
        /// Suspended (ACPI S3).
        Suspended = "suspended",
        /// Stopped by its watchdog.
        Watchdog = "watchdog",
        /// Stopped by a panic.
        GuestPanicked = "guest-panicked",
        /// Stopped for COLO.
        Colo = "colo",
    }
}

names! {
    /// Status of a migration. //= qemu qapi/migration.json MigrationStatus
    MigrationStatus {
        /// There was none.
        None = "none",
        /// Being set up.
        Setup = "setup",
        /// Cancel was asked for.
        Cancelling = "cancelling",
        /// Cancelled.
        Cancelled = "cancelled",
        /// Pre-copy runs.
        Active = "active",
        /// Post-copy runs.
        PostcopyActive = "postcopy-active",
        /// Post-copy lost its connection.
        PostcopyPaused = "postcopy-paused",
        /// Post-copy prepares its recovery.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Post-copy recovers.
        PostcopyRecover = "postcopy-recover",
        /// Complete.
        Completed = "completed",
        /// Failed.
        Failed = "failed",
        /// COLO runs.
        Colo = "colo",
        /// The guest is stopped and QEMU waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// Device state is being sent; the guest is stopped.
        Device = "device",
        /// Waits for a device to be unplugged.
        WaitUnplug = "wait-unplug",
    }
}

impl MigrationStatus {
    /// Has the migration ended, in whichever way?
    pub fn has_ended(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

names! {
    /// A capability of migration that we set or look at. //= qemu qapi/migration.json MigrationCapability
    Capability {
        /// Delta compression against QEMU's own cache: excluded (S8).
        Xbzrle = "xbzrle",
        /// Throttles the vCPUs of a guest that dirties too fast.
        AutoConverge = "auto-converge",
        /// Sends MIGRATION and MIGRATION_PASS events.
        Events = "events",
        /// Post-copy.
        PostcopyRam = "postcopy-ram",
        /// Frees source memory as it is sent: excluded.
        ReleaseRam = "release-ram",
        /// Messages from target to source; needed (S4).
        ReturnPath = "return-path",
        /// Stops before device state is sent.
        PauseBeforeSwitchover = "pause-before-switchover",
        /// Pages on several connections: not with our engine.
        Multifd = "multifd",
        /// Dirty bitmaps of block devices.
        DirtyBitmaps = "dirty-bitmaps",
        /// Block devices are activated by `cont` (always so since 10.0).
        LateBlockActivate = "late-block-activate",
        /// Leaves shared memory out of the stream: refused at the source (S8).
        IgnoreShared = "x-ignore-shared",
        /// Refuses a stream of another VM.
        ValidateUuid = "validate-uuid",
        /// The source waits for the target's word before it stops the guest (8.1 and later).
        SwitchoverAck = "switchover-ack",
        /// Limits dirtying per vCPU (8.1 and later).
        DirtyLimit = "dirty-limit",
        /// Fixed places of pages in a file: not with our engine.
        MappedRam = "mapped-ram",
    }
}
