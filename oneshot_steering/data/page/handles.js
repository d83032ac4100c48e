/* Sliders of ipywidgets draw their handles without a name for screen readers; this gives them the text of their label. */
if (!window.oneshotNames) {
  window.oneshotNames = () => {
    for (const slider of document.querySelectorAll(".oneshot-strength")) {
      const handle = slider.querySelector(".noUi-handle"), label = slider.querySelector(".widget-label");
      if (handle && label) handle.setAttribute("aria-label", label.textContent);
    }
  };
  new MutationObserver(window.oneshotNames).observe(document.body, {childList: true, subtree: true});
}
window.oneshotNames();
