//! Stages that an operator or a measurement can switch off.

/// Stages that are switched off, to measure what each is worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disable {
    /// Send pages again whose content the target has.
    pub same: bool,
    /// Send zero pages as content.
    pub zero: bool,
    /// Send content again that another page has.
    pub copy: bool,
    /// Send content that the target holds outside the image.
    pub known: bool,
    /// Send changed pages as a whole.
    pub delta: bool,
    /// Send everything uncompressed.
    pub literal: bool,
    /// Compress even what looks random.
    pub raw: bool,
}

/// A name that is no stage which can be switched off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no stage named {0:?}; known are same, zero, copy, known, delta, literal, raw")]
pub struct UnknownStage(pub String);

impl Disable {
    /// Switches the stage of this name off.
    ///
    /// # Errors
    /// When there is no such stage.
    pub fn add(&mut self, stage: &str) -> Result<(), UnknownStage> {
        match stage {
            "same" => self.same = true,
            "zero" => self.zero = true,
            "copy" => self.copy = true,
            "known" => self.known = true,
            "delta" => self.delta = true,
            "literal" => self.literal = true,
            "raw" => self.raw = true,
            _ => return Err(UnknownStage(stage.into())),
        }
        Ok(())
    }
}
