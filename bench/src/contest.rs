//! Which servers are measured, and how they are set up for it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use storage::{Options, Store};

use crate::resident::clear;
use crate::servers::{Plan, Program, Server, vestibule};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Against {
    Synapse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Database {
    Sqlite,
    Postgres,
}

#[derive(clap::Args, Clone, Debug)]
pub struct ContestArguments {
    /// Measures this server, too.
    #[arg(long)]
    against: Option<Against>,
    /// What Vestibule keeps its data in; Synapse is always on SQLite.
    #[arg(long, default_value = "sqlite")]
    database: Database,
    /// How often; the medians are shown.
    #[arg(long, default_value_t = 1)]
    pub repeat: usize,
    /// The Python that has Synapse.
    #[arg(long, default_value = "target/dev/venv/bin/python")]
    python: PathBuf,
    /// An empty PostgreSQL database, everything in which is deleted.
    #[arg(long, env = "VESTIBULE_TEST_POSTGRES", hide_env_values = true)]
    postgres: Option<String>,
}

impl ContestArguments {
    /// Ours first.
    pub fn programs(&self) -> anyhow::Result<Vec<Program>> {
        let mut programs = vec![Program::Vestibule(vestibule()?)];
        if self.against == Some(Against::Synapse) {
            let python = std::path::absolute(&self.python)?;
            ensure!(
                python.exists(),
                "{} is missing: ./dev setup",
                python.display()
            );
            programs.push(Program::Synapse(python));
        }
        Ok(programs)
    }

    /// What it is called in tables.
    pub fn label(&self, program: &Program) -> String {
        match (program, self.database) {
            (Program::Vestibule(_), Database::Postgres) => "vestibule (PostgreSQL)".to_owned(),
            _ => program.to_string(),
        }
    }

    /// A new server that has seen nothing.
    pub async fn set_up(
        &self,
        program: &Program,
        home: &Path,
        notary: &str,
    ) -> anyhow::Result<Server> {
        clear(home)?;
        let mut plan = Plan::new(program.clone(), home.to_owned());
        plan.notary = Some(notary.to_owned());
        plan.open = true;
        plan.log_level = "warn";
        if self.database == Database::Postgres && matches!(program, Program::Vestibule(_)) {
            let url = self.postgres.as_deref().context("which PostgreSQL?")?;
            if !url.starts_with("postgres") {
                bail!("{url} is no PostgreSQL");
            }
            empty(url).await?;
            plan.database = Some(url.to_owned());
        }
        Server::set_up(&plan)
    }
}

async fn empty(url: &str) -> anyhow::Result<()> {
    let store = Store::open(url, Options::default()).await?;
    let emptied = store.write(|c| {
        c.execute("DROP SCHEMA public CASCADE", &[])?;
        c.execute("CREATE SCHEMA public", &[])
    });
    emptied.await?;
    Ok(())
}
