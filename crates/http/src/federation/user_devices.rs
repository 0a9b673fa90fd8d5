//! `GET /user/devices`: the devices of a user of ours.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1userdevicesuserid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde_json::Value;

use super::signed::Origin;
use crate::error::Result;
use crate::extract::Path;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(user): Path<UserId>,
    _: Origin,
) -> Result<Json<Value>> {
    if !homeserver.config().is_ours(&user) {
        return Err(MatrixError::invalid_param("This user is another server's").into());
    }
    Ok(Json(homeserver.federation_user_devices(&user).await?))
}
