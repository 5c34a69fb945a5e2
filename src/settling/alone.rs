//! Without the other host: what the journal proves, and beyond it the operator's word.

use anyhow::{bail, ensure};

use super::{Settling, Word};
use crate::journal::{Role, Step};

impl Settling {
    /// Without contact: what the journal alone decides, or the operator's word. Returns where the
    /// guest is, `None` when only the other host can say.
    pub(crate) async fn alone(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        let step = self.entry.step.clone();
        let own = match (&step, self.entry.role) {
            (Step::Started, Role::Source) | (Step::SettledHere { .. }, _) => Word::Here,
            (Step::Committed { blocks, .. }, _) if !blocks.is_empty() => bail!(
                "the guest here may lack pages that only the other host has: use --listen or --to"
            ),
            (Step::Committed { .. } | Step::Running, _) => Word::Here,
            (Step::Started, Role::Target)
            | (Step::Refused { .. } | Step::NeverRan { .. } | Step::SettledThere { .. }, _) => {
                Word::There
            }
            (Step::Intent { .. }, _) => return self.in_doubt(word, other_is_dead).await,
            (Step::Filling { .. }, _) => bail!(
                "the guest runs here and lacks pages that only the other host has: use --listen or --to"
            ),
            (Step::Holding { .. }, _) => return self.stop_holding(word, other_is_dead).await,
        };
        if let (Step::Committed { .. }, Some(Word::There), true) = (&step, word, other_is_dead)
            && self.qemu().await?.is_none()
        {
            // Nobody can tell whether it ran before its QEMU ended: the operator decides.
            return self.give_up("the operator's word").await.map(Some);
        }
        if let Some(word) = word
            && word != own
        {
            bail!(
                "the journal proves that the guest is {} ({}): refused",
                if own == Word::Here {
                    "here"
                } else {
                    "at the peer"
                },
                step.name()
            );
        }
        match own {
            // The guest ran here, and its QEMU has ended since.
            Word::Here if step == Step::Running && self.qemu().await?.is_none() => {
                self.append(Step::SettledHere {
                    reason: "its QEMU has ended".into(),
                })?;
                Ok(Some("here, and its QEMU has ended"))
            }
            Word::Here => self.keep("settled by the journal").await.map(Some),
            Word::There => self.give_up("settled by the journal").await.map(Some),
        }
    }

    /// Intent is written: Commit may have been sent.
    async fn in_doubt(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        match word {
            None => Ok(None),
            Some(Word::There) => {
                ensure!(
                    other_is_dead,
                    "the target has not said that the guest runs there: use --listen or --to, or add \
                     --i-know-the-other-is-dead to give the copy here up"
                );
                self.give_up("the operator's word").await.map(Some)
            }
            Some(Word::Here) => {
                ensure!(
                    other_is_dead,
                    "the target may run the guest: use --listen or --to, or add \
                     --i-know-the-other-is-dead when its copy can never run again"
                );
                self.entry.epoch += 1;
                self.keep("the operator's word").await.map(Some)
            }
        }
    }

    /// The guest runs at the peer and lacks pages that are here.
    async fn stop_holding(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        ensure!(
            word == Some(Word::There) && other_is_dead,
            "the guest runs at the peer and needs pages of the copy here: use --listen or --to, or \
             --there --i-know-the-other-is-dead to throw them away"
        );
        self.give_up("the operator's word").await.map(Some)
    }
}
