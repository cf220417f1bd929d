def save_adapter(model, folder, base): 
    folder.mkdir(); (folder/'x').write_text('x')
